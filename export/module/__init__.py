"""What a torch module is: its parts, its dropouts, what it draws, what it answers, and how to leave
it untouched.
"""
