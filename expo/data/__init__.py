"""Questions with checkable answers, from files, the Hugging Face hub or a generator, and their prompts."""

from expo.data.gradable import bad_questions, only_gradable
from expo.data.layouts import ReadOptions
from expo.data.overlap import Overlap, find_overlap
from expo.data.prompts import PROMPTS, prompt_warnings, render_prompt, render_prompts, render_whole_set
from expo.data.questions import QuestionSet, question_id
from expo.data.sources import BUILT_IN, load_questions

__all__ = [
    "BUILT_IN",
    "PROMPTS",
    "Overlap",
    "QuestionSet",
    "ReadOptions",
    "bad_questions",
    "find_overlap",
    "load_questions",
    "only_gradable",
    "prompt_warnings",
    "question_id",
    "render_prompt",
    "render_prompts",
    "render_whole_set",
]
