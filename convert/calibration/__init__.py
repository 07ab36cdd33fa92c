"""Run the model over a text and measure the inputs of every matrix."""
