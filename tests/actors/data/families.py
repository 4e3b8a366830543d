"""Tokenizers of one token a byte that render conversations as the families of chat models do."""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actors.model.tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(thinking) {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Leaves the thoughts of earlier turns out, as templates of reasoning models do."""
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS_MARKED = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
"""Without what closes them."""
OPEN = (
    "{% for m in messages %}<|im_start|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_start|>{% endif %}{% endfor %}"
)
"""Turns are opened, and not closed."""


@dataclass(frozen=True)
class Family:
    """How a family writes a conversation, and what it puts around what the assistant says."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    before: str
    """Written ahead of the assistant's words as a part of what it says."""
    closes: str
    """The token that ends its turn."""

    def tokenizer(self, template: str | None = None) -> PreTrainedTokenizerFast:
        """With a BOS before every string, as the family's own tokenizer has it."""
        base = byte_tokenizer(512)
        fast = Tokenizer(models.BPE(vocab={k: v for k, v in base.get_vocab().items() if v < 256}, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        if self.bos is not None:
            fast.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, fast.token_to_id(self.bos))]
            )
        made = PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token=self.bos, eos_token=self.eos, clean_up_tokenization_spaces=False
        )
        made.chat_template = template or self.template
        return made


FAMILIES = {
    "ChatML": Family(CHATML, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "", "<|im_end|>"),
    "Llama 3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "",
        "<|eot_id|>",
    ),
    "Mistral": Family(MISTRAL, ("<s>", "</s>"), "<s>", "</s>", " ", "</s>"),
}
