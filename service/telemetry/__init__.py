"""What a server reports about itself: metrics, statistics, logs and traces."""
