"""Messages to ids and ids to text, in the form of each release."""
