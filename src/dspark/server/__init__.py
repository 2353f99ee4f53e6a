"""The OpenAI-compatible server: requests in, events of the engine out."""
