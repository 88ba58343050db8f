"""`engram torture`: processes that check every byte while others are killed under them."""
