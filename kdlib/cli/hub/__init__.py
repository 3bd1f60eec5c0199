"""Sending runs, caches and traces to the Hugging Face Hub."""
