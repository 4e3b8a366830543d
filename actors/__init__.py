"""The Ray actors and the loop that drives them. Read controller.py first: it is the whole algorithm.

The loop     controller.py   two coroutines: prompts become groups, batches become weight versions
             pacer.py        algorithms/pacing.py as waits        attempts.py      what becomes of one dispatch
             router.py       groups to replicas and back          ledger.py        one fate for every group, waste
             publisher.py    one version to all replicas          weighing.py      what a batch's weights depend on
             fleet.py        replicas and their states            turns.py         who computes on GPUs that are shared
             elastic.py      replicas come and go                 scaling.py       how many, as somebody asks for
The record   fates.py        what the journal's events say       journal.py       the journal as a file
The actors   policy.py       one DeepSpeed rank                   policy_group.py  all ranks as one
             policy_state.py what its next step depends on        objective.py     what a step minimises
             host_copy.py    that, copied to host memory fast     orphans.py       no process outlives its actor
             policy_calls.py what a rank is told, and answers
             critic.py       one rank of PPO's critic             critic_group.py  all of them as one
             rollout.py      one vLLM replica                     reference.py     frozen log-probabilities
             sampled.py      a rollout as far as it is sampled
             reward.py       scores, in a killable child          workers.py       starts and stops all of them
             settings.py     what each is told of the recipe      scorers.py       who scores and hangs is started again
Looks on     health.py       what is done about a run that goes wrong
Waits        deadline.py     every wait has a deadline and a name  errors.py       what stops a run
             apart.py        a life whose end nothing swallows    deaths.py        who is gone, and who only raised
Around it    recipe/  what a run is told     data/  prompts and examples     model/  load and forward
             rewards/ the child process      run/   from recipe to run folder    checkpoint/  cuts to go on from
"""
