"""What a server tells of itself: figures, logs and traces."""
