"""A Ray cluster whose nodes share nothing but the files: each has a network, a host name and a /tmp/ray of its own.

    unshare --map-root-user --net --mount python -m tests.deploy.machines_apart FOLDER

Runs the order in FOLDER (tests/deploy/light_engines.py) on it and exits as the run does. Linux only. The namespaces are
made inside one of users, so it needs no root and leaves nothing behind.
"""

import subprocess
import sys
from pathlib import Path

import psutil

from tests.chaos.test_node_loss import Machines, until
from tests.deploy.test_job_submit import BIN, ROOT

NAMES = ("node0", "node1", "node2")
"""Also their host names; the first is the head, and the two others are for the policy."""
RUN_S = 400.0
PORT = 6379

_BRIDGE = """
mount -t tmpfs none /run && mkdir /run/netns
ip link set lo up && ip link add bridge type bridge && ip link set bridge up
"""
_NODE = """
ip netns add {name} && ip link add port-{name} type veth peer name link-{name}
ip link set link-{name} netns {name} && ip link set port-{name} master bridge up
ip netns exec {name} ip link set lo up
ip netns exec {name} ip addr add {host}/24 dev link-{name}
ip netns exec {name} ip link set link-{name} up
"""
_OWN = """
mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray
mount --bind "$1" /etc/hosts
hostname "$2"
shift 2
exec "$@"
"""


def host_of(name: str) -> str:
    return f"10.9.0.{NAMES.index(name) + 1}"


def build(folder: Path) -> None:
    """The network, and the names in it."""
    script = _BRIDGE + "".join(_NODE.format(name=name, host=host_of(name)) for name in NAMES)
    subprocess.run(["bash", "-e", "-c", script], check=True)
    names = "".join(f"{host_of(name)} {name}\n" for name in NAMES)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")


class MachinesApart(Machines):
    """Ray nodes, each in namespaces of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "ray.log")
        self.address = f"{host_of(NAMES[0])}:{PORT}"
        self._hosts = str(folder / "hosts")

    def start(self, *arguments: str) -> psutil.Popen:
        name = NAMES[len(self.nodes)]
        ray = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={host_of(name)}", *arguments]
        own = ["unshare", "--uts", "sh", "-e", "-c", _OWN, "sh", self._hosts, name, *ray]
        return self.started(["ip", "netns", "exec", name, *own])


def main(folder: Path) -> int:
    build(folder)
    machines = MachinesApart(folder)
    try:
        head = machines.head()
        for resources in ("{}", '{"rollouts": 1}'):
            more = ("--num-cpus=1", "--labels=tier=train", f"--resources={resources}")
            machines.start(f"--address={machines.address}", *more)
        # The driver is one of the head's processes: the same network, host name and /tmp/ray.
        there = ["nsenter", f"--target={head.pid}", "--mount", "--net", "--uts", f"--wd={ROOT}"]
        command = [*there, sys.executable, "-m", "tests.deploy.light_engines", machines.address]
        with (folder / "order.json").open() as said:
            run = subprocess.Popen(command, stdin=said, env=machines.env, cwd=ROOT)
        until(head, lambda: run.poll() is not None, RUN_S)
        return run.returncode
    finally:
        machines.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
