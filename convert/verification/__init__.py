"""Check a finished checkpoint, alone or against its source."""
