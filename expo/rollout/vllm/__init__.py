"""Rollouts by vLLM: in the trainer's process, or by servers in processes of their own."""
