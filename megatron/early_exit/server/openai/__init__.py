"""OpenAI's protocol, with vLLM's extras."""
