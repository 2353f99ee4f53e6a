"""Many requests on one target: what a request asks for, and the engine that answers it."""
