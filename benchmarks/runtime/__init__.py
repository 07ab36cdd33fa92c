"""Speed, memory and passes of the runtime beside its peers."""
