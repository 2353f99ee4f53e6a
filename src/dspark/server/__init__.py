"""An engine over HTTP: the OpenAI-compatible API, its metrics, and a page to try it."""
