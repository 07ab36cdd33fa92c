"""Write the checkpoint: shards, manifest, tokenizer files, card and report."""
