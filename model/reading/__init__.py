"""Files of texts and labels, read as they stand: one file a format, nothing guessed."""
