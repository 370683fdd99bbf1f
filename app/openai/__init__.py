"""OpenAI's dialect of the images interface, over the same use cases."""
