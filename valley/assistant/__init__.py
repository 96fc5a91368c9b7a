"""A trained model in use: load it, ask it about videos and images, talk to it in a terminal."""
