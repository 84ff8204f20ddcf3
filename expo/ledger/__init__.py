"""The embedded task: questions, tokenizer, and a warm-started model that is small enough to ship."""

from pathlib import Path

from expo.ledger.questions import LedgerQuestion, beyond_questions, held_out_questions, train_questions

MODEL_PATH = Path(__file__).parent / "model"

__all__ = ["MODEL_PATH", "LedgerQuestion", "beyond_questions", "held_out_questions", "train_questions"]
