"""Weight transfer from rank 0 to vLLM servers: through files, or by broadcast."""
