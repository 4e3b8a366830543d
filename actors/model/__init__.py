"""The language model.

load.py     weights and tokenizer
tiny.py     make a small one from a config
size.py     how large it is, from its files
costs.py    where its work goes, from its config
template.py  a chat template of the recipe's own
files.py    a folder that others load as it is
forward.py  log-probabilities of a packed row
segments.py which of its tokens attend to which, and in which calls
head.py     an output head that scores given tokens
team.py     ranks that share out a row, and exchange tokens for heads
heads.py    which teams can share out its heads
kernels.py  fused kernels of liger-kernel, on GPUs
optimizer.py AdamW, and how DeepSpeed drives it
learner.py  what a rank trains: loaded as its objective needs it, adapters on top
quantize.py the model below adapters in four bits
teacher.py  a frozen model beside the policy
lora.py     adapters: what is trained, travels and is saved
"""
