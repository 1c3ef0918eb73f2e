"""A cloud that is not there: moto's EC2 and IAM on the launcher, and a machine of the lab for each of its instances."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from lab import CHECKOUT, LAUNCHER_IP, NETWORK, Lab, Node

PORT = 5555
ENDPOINT = f"http://{LAUNCHER_IP}:{PORT}"
REGION = "us-west-2"
VENV = CHECKOUT / ".venv-peers" / "moto"
PINS = ("moto[server,ec2,iam]==5.2.5", "boto3==1.44.5")
_ACCOUNT = {
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "2",
}


def why_not() -> str:
    """What is missing for a fake cloud; empty: nothing."""
    venv = Path(os.environ.get("VLA_DIST_MOTO_VENV", VENV))
    if not (venv / "bin" / "moto_server").exists():
        return f"no moto in {venv}; `make test-cluster` installs it"
    return ""


class Cloud:
    """Instances become machines when they run and vanish when they are terminated. ``close`` before the lab's."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.machines: dict[str, Node] = {}
        self.launched: list[str] = []
        """Types of all instances that there ever were, in order."""
        self._venv = Path(os.environ.get("VLA_DIST_MOTO_VENV", VENV))
        self._log = open(lab.folder / "moto.log", "wb")  # noqa: SIM115  as long as the process that writes it
        environment = {**lab.environment(), "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
        words = [f"{self._venv}/bin/moto_server", "-H", LAUNCHER_IP, "-p", str(PORT)]
        self._server = self._start(words, environment, self._log)
        self._ids: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        """Address -> type of every instance that there ever was."""
        self._watch = self._start(
            [f"{self._venv}/bin/python", str(Path(__file__).with_name("ec2_watch.py")), ENDPOINT, REGION],
            {**lab.environment(), **_ACCOUNT},
            subprocess.PIPE,
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        self.trouble = ""

    def prepare(self) -> dict[str, str]:
        """What an account has before `ray up`: key pair, subnet, image. Names of the three."""
        program = (
            "import boto3, json, sys; e = boto3.client('ec2');"
            f"v = e.create_vpc(CidrBlock='{NETWORK}.0/24')['Vpc']['VpcId'];"
            f"s = e.create_subnet(VpcId=v, CidrBlock='{NETWORK}.0/24', "
            f"AvailabilityZone='{REGION}a')['Subnet']['SubnetId'];"
            "e.import_key_pair(KeyName='lab', PublicKeyMaterial=open(sys.argv[1], 'rb').read());"
            "i = e.describe_images(Owners=['amazon'])['Images'][0]['ImageId'];"
            "print(json.dumps({'subnet': s, 'key': 'lab', 'image': i}))"
        )
        words = [f"{self._venv}/bin/python", "-c", program, f"{self.lab.key}.pub"]

        def attempt():
            done = self.lab.run(words, env=_ACCOUNT)
            return json.loads(done.out.strip().splitlines()[-1]) if done.code == 0 else None

        return self.lab.wait_for(attempt, what="the fake cloud", timeout_s=400, every_s=1)

    def write_cluster_file(self, account: dict[str, str]) -> Path:
        """ray_cluster.yaml of the repository's root, with this account in it."""
        text = (CHECKOUT / "ray_cluster.yaml").read_text()
        network = f"KeyName: {account['key']}\n            SubnetIds: [{account['subnet']}]\n            ImageId"
        edits = {
            "use_internal_ips: false": "use_internal_ips: true",
            "ssh_user: ubuntu": f"ssh_user: root\n    ssh_private_key: {self.lab.key}",
            "203.0.113.0/24": f"{NETWORK}.0/24",
            "ImageId: latest_dlami": f"{network}: {account['image']}",
            "fs-EDIT": "fs-lab",
            "cluster_name: vla-dist": f"cluster_name: {self.lab.name('aws')}",
        }
        for old, new in edits.items():
            assert old in text, f"ray_cluster.yaml has no {old!r} any more"
            text = text.replace(old, new)
        path = self.lab.folder / "ray_cluster.yaml"
        path.write_text(text)
        return path

    def environment(self) -> dict[str, str]:
        return dict(_ACCOUNT)

    def terminate(self, address: str) -> None:
        """What a cloud does with a spot instance."""
        program = f"import boto3; boto3.client('ec2').terminate_instances(InstanceIds=['{self._ids[address]}'])"
        self.lab.run([f"{self._venv}/bin/python", "-c", program], env=_ACCOUNT).ok()

    def close(self) -> None:
        for process in (self._watch, self._server):
            process.kill()
            process.wait(timeout=10)
        self._thread.join(timeout=30)
        assert self._watch.stdout is not None
        self._watch.stdout.close()
        self._log.close()

    def _start(self, words, environment, output) -> subprocess.Popen[bytes]:
        # --kill-child ends it with this test, whatever happens.
        guard = ["unshare", "--fork", "--kill-child"]
        command = ["ip", "netns", "exec", self.lab.name("hub"), *guard, *words]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=self._log, cwd=self.lab.folder)

    def _follow(self) -> None:
        assert self._watch.stdout is not None
        for line in self._watch.stdout:
            try:
                self._match(json.loads(line)["running"])
            except Exception as error:
                self.trouble = f"{type(error).__name__}: {error}"
                print(f"fake cloud: {self.trouble}", file=sys.stderr, flush=True)

    def _match(self, running: dict[str, list[str]]) -> None:
        for address in set(self.machines) - set(running):
            self.machines.pop(address).kill()
        for address in sorted(set(running) - set(self.machines)):
            identity, kind = running[address]
            self._ids[address], self.kinds[address] = identity, kind
            self.launched.append(kind)
            self.machines[address] = self._boot(address, identity)

    def _boot(self, address: str, identity: str) -> Node:
        name = identity.replace("-", "")[-8:]
        node = Node(self.lab, name, address)
        exports = "".join(f"export {key}={value}\n" for key, value in _ACCOUNT.items())
        (node.root / "home" / ".bashrc").write_text(exports)
        self.lab.nodes[name] = node
        node.start()
        return node
