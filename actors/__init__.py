"""The Ray actors and the loop that drives them. Read controller.py first: it is the whole algorithm.

The loop      controller.py   two coroutines: prompts become groups, batches become weight versions
              pacer.py        algorithms/pacing.py as waits      router.py    which replica samples a group
              publisher.py    one version to all replicas        ledger.py    one fate for every group
The actors    policy.py       one DeepSpeed rank                 policy_group.py  all ranks as one
              rollout.py      one vLLM replica                   reference.py     frozen log-probabilities
              reward.py       scores in a killable child (reward_child, reward_process, reward_pipe, reward_functions)
              workers.py      starts and stops all of them       pools.py         which pools a recipe uses
The data      dataset.py      rows                               prompts.py, examples.py   rows as token ids
The model     model.py        load                               tiny_model.py    make one from a config
              forward.py      log-probabilities of a packed row
The recipe    recipe.py       what may be said                   recipe_file.py   read, check, write
                                                                 (plain_yaml.py, recipe_errors.py)
The run       grpo_run.py, sft_run.py   from recipe to run folder        run_folder.py     what a run leaves behind
              reporter.py, progress.py, plot.py, tracker.py
              deadline.py     every wait has a deadline and a name
"""
