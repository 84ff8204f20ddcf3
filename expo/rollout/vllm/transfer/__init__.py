"""How the policy's weights reach vLLM servers: through files, or by a broadcast from rank 0."""
