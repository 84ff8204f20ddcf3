"""The ledger's tokenizer: one token per character, with "\\boxed{" as a single token."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
BOXED = "\\boxed{"
VOCABULARY = (PAD, EOS, UNKNOWN, *"0123456789+-=,", BOXED, "}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer over `VOCABULARY`; ids are the positions there, and decoding joins without spaces.

    Padding is on the left, as generation wants it. Characters outside the vocabulary become "<unk>".
    """
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
