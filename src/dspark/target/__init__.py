"""Any Hugging Face causal LM: load it, tap its layers, score tokens, roll back exactly."""
