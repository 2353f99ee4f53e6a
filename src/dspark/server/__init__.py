"""The OpenAI-compatible server. Needs `pip install 'dspark[serve]'`."""
