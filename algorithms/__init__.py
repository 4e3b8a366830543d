"""Mathematics and decisions of the training loop, pure: nothing here touches Ray, vLLM, DeepSpeed, a file or a socket.

types.py        what travels: Prompt -> Group -> ScoredGroup -> Batch -> Update
config.py       what a recipe may say about the algorithm, the staleness bound and the optimizer
learning_rate.py which schedules there are, and what each can be told
order.py        which prompt comes at which ordinal
pacing.py       the scheduler: what may start, and what a training step takes
slots.py        what the scheduler hands out and takes in
routing.py      which replica a group goes to
blame.py        whether a prompt or a replica is to blame for attempts that fail
filters.py      which groups carry no signal (dynamic sampling)
depth.py        how deep the pipeline may be, from how far off policy the samples are
budgets.py      how much of the user's own code may fail
health/         rules over the metrics of the last steps: when a run is not learning any more
bias.py         whether what is trained differs from what is sampled
simulation/     a run in virtual time, by the same pacer and router
combinations.py which choices of a recipe contradict one another
advantages.py   rewards of a group -> one advantage per rollout
gae.py          rewards and a critic's values -> an advantage per token
costs.py        what a sequence costs the policy to compute
partition.py    items -> parts of nearly equal weight
overlong.py     what a completion near the length limit is punished with
signal.py       rewards of a batch -> its advantages, penalties, baseline and scale included
packing.py      rollouts -> balanced micro-batches of every policy rank
packed.py       one micro-batch as the tensors of one row
head.py         hidden states and output head -> log-probabilities and entropies, without logits
divergence.py   two hidden states and output heads -> how far the distributions are apart, without logits
gkd.py          what each token weighs when a student learns from a teacher
logprobs.py     the same from logits, for models that change what the head gives
corrections.py  importance weights against the weights that sampled the tokens
preference/     losses on pairs of answers, and on answers that are good or bad
losses/         one micro-batch's share of the loss of the global batch, a file for each ingredient of the formula
stats.py        what a loss measures, mergeable over micro-batches and ranks
metrics.py      what a batch says of itself before it is trained: rewards, lengths, staleness
"""
