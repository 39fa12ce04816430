"""The expectation-gap audit: whether training passes on, on average, what eval passes on."""
