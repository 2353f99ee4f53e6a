"""The network that is grafted on: backbone, sequential heads, confidence, and the folder format."""
