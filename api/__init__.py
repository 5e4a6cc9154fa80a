"""HTTP surfaces and text: OpenAI, native and admin routes, tokenization, streaming."""
