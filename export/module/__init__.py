"""What a torch module is: its parts and dropouts, what it draws, what it answers."""
