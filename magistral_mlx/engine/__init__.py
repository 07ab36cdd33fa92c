"""A loaded model and its replies: ask, stream, sample, chat."""
