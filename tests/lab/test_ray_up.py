"""`ray up` itself, on hosts with real sshd: the shipped files with nothing changed but what the lab cannot have."""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import yaml
from hosts import Lab, why_not
from launching import PROFILE, ROOT, SETUP, Launcher, answers, wait_until
from pyarrow.fs import FileSelector

from memlib.checkpoints import CheckpointFolder
from memlib.results import create_results

REASON = why_not()
pytestmark = [pytest.mark.lab, pytest.mark.skipif(REASON is not None, reason=f"ray up: {REASON}")]

SWEEP = (
    "--preset quick --dropouts none --limit 1000 --set model.width=0.0625 --set training.precision=float32 --seeds 0 1 "
    "--device cpu --experiments rewinding --set rewinding.epochs=[0]"
)
UNITS = 2 * 9  # both runs' layer groups, each rewound to epoch 0
EPOCHS = 100  # ten seconds where nothing else runs: a loss falls into the middle also on a fast machine
PATIENCE = 600  # seconds a sweep may take: a busy machine takes several times what a quiet one does
IMAGE = "ami-03cf127a"  # one of the mock's
BUCKET = "memlib-lab"
MOCK_PORT = 5555


def epochs_done(store):
    """Of each unfinished run, the epochs it could continue from."""
    place = FileSelector(f"{store.storage.root}/checkpoints", allow_not_found=True)
    counts = []
    for run in store.storage.filesystem.get_file_info(place):
        with contextlib.suppress(FileNotFoundError):  # the run ended between looking and reading
            last = CheckpointFolder(store.storage, run.base_name).load_last()
            counts += [] if last is None else [len(last.facts["records"]) - 1]
    return counts


def assert_complete(store):
    """Both runs and their experiment are there, each row once."""
    runs = store.read("runs").to_pylist()
    assert sorted(row["seed"] for row in runs) == [0, 1]
    assert all(row["status"] == "done" for row in runs), runs
    epochs = store.read("epochs").select(["run_id", "epoch", "split"]).to_pylist()
    assert len(epochs) == len({tuple(row.values()) for row in epochs}) == 2 * (EPOCHS + 1) * 3
    assert len(store.units("rewinding")) == UNITS


def status_of(url, token=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def lab(tmp_path):
    with Lab(tmp_path, PROFILE) as made:
        yield made


def test_machines_one_has_are_a_cluster_with_closed_doors_that_outlives_the_loss_of_one(lab):
    lab.start(0, 1, 2, 3)
    head, stranger = lab.address(0), 3
    config = yaml.safe_load((ROOT / "cluster-local.yaml").read_text())
    config |= {"cluster_name": f"memlib-local-{os.getpid()}", "setup_commands": [SETUP]}
    config["provider"] |= {"head_ip": head, "worker_ips": [lab.address(1), lab.address(2)]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    launcher = Launcher(lab, config)
    store = create_results(lab.shared / "results")
    launcher.up()

    assert not answers(head, 8265), "the dashboard is open to the network"
    assert lab.run_on(0, "stat -c %a ~/.ray/auth_token").split()[-1] == "600"
    join = f"import ray; ray.init(address='{head}:6379')"
    refused = lab.start_on(stranger, f'RAY_AUTH_MODE=disabled python -c "{join}"')
    with launcher.dashboard() as address:
        token = (lab.home / ".ray" / "auth_token").read_text()
        jobs = f"{address}/api/jobs/"
        assert [status_of(jobs), status_of(jobs, "wrong"), status_of(jobs, token)] == [401, 403, 200]
        sweep = launcher.sweep(address, f"{SWEEP} --epochs {EPOCHS} --results /tmp/shared/results")
        wait_until(lambda: len(epochs_done(store)) == 2 and min(epochs_done(store)) >= 2, PATIENCE, "epochs", sweep)
        lab.kill(1)
        log = sweep.wait(PATIENCE)
    assert "2 runs wanted, 0 done" in log
    assert log.count("started again") == 1, log
    assert_complete(store)
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode != 0
    assert "InvalidAuthToken" in output

    launcher.down()
    assert "raylet" not in lab.run_on(0, "ps ax")
    assert "raylet" in lab.run_on(2, "ps ax")  # Ray leaves workers of provider local alone; docs/cluster.md says how to
    lab.run_on(2, "memlib/.venv/bin/ray stop")
    assert "raylet" not in lab.run_on(2, "ps ax")


class Mock:
    """A mock of AWS on the bridge, whose instances get the addresses of the lab's hosts in turn."""

    def __init__(self, lab, session):
        self.ec2 = session.client("ec2")
        network = f"{lab.network}.0/24"
        self.vpc = self.ec2.create_vpc(CidrBlock=network)["Vpc"]["VpcId"]
        subnet = self.ec2.create_subnet(VpcId=self.vpc, CidrBlock=network, AvailabilityZone="us-east-1a")["Subnet"]
        self.ec2.import_key_pair(KeyName="lab", PublicKeyMaterial=lab.key.with_suffix(".pub").read_bytes())
        before = self.ec2.run_instances(ImageId=IMAGE, MinCount=7, MaxCount=7, SubnetId=subnet["SubnetId"])["Instances"]
        assert before[-1]["PrivateIpAddress"] == f"{lab.network}.10"
        self.ec2.terminate_instances(InstanceIds=[i["InstanceId"] for i in before])

    def running(self, kind):
        """The addresses of the head's or the workers' instances, by id."""
        filters = [
            {"Name": "tag:ray-node-type", "Values": [kind]},
            {"Name": "instance-state-name", "Values": ["running"]},
        ]
        found = self.ec2.describe_instances(Filters=filters)["Reservations"]
        return {i["InstanceId"]: i["PrivateIpAddress"] for r in found for i in r["Instances"]}

    def machines(self):
        """All instances there ever were, but those of the preparation."""
        found = self.ec2.describe_instances(Filters=[{"Name": "tag:project", "Values": ["memlib"]}])["Reservations"]
        return [i for r in found for i in r["Instances"]]


@pytest.fixture
def mock(lab, tmp_path):
    """The mock, and what a process needs in its environment to talk to it as `who`."""
    url = f"http://{lab.gateway}:{MOCK_PORT}"
    recording = tmp_path / "recording"

    def environment(who):
        names = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": who, "AWS_SECRET_ACCESS_KEY": "secret"}
        return names | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}

    lab.profile += "\nexport " + " ".join(f"{k}={v}" for k, v in environment("HEAD").items())
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", lab.gateway, "-p", str(MOCK_PORT)],
        env={"PATH": "/usr/bin:/bin", "MOTO_ENABLE_RECORDING": "true", "MOTO_RECORDER_FILEPATH": str(recording)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(lab.gateway, MOCK_PORT), 60, "the mock of AWS")
        yield environment, recording
    finally:
        server.kill()
        server.wait()


def asked_of(recording, who):
    """The EC2 and IAM actions that were asked for with an access key."""
    found = set()
    for call in map(json.loads, recording.read_text().splitlines()):
        if f"Credential={who}/" in call["headers"].get("Authorization", ""):
            body = base64.b64decode(call["body"]) if call["body_encoded"] else call["body"].encode()
            found |= {action.decode() for action in re.findall(rb"Action=(\w+)", body[:4096])}
    return found


def granted(policy):
    statements = json.loads((ROOT / "cluster" / f"iam-{policy}.json").read_text())["Statement"]
    actions = [a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])]
    return {a.partition(":")[2] for a in actions}


def test_the_shipped_file_on_ec2_grows_from_nothing_outlives_a_spot_loss_and_leaves_nothing(lab, mock, monkeypatch):
    import boto3

    environment, recording = mock
    lab.start(0, 1, 2, 3, 4)
    for name, value in environment("ADMIN").items():
        monkeypatch.setenv(name, value)
    cloud = Mock(lab, boto3.Session(region_name="us-east-1"))
    file = lab.folder / "cluster.yaml"
    file.write_text((ROOT / "cluster.yaml").read_text())
    aws = [sys.executable, str(ROOT / "cluster" / "aws.py"), "--cluster", str(file)]
    prepare = ["prepare", "--bucket", BUCKET, "--from", lab.gateway, "--image", IMAGE, "--vpc", cloud.vpc]
    subprocess.run([*aws, *prepare], check=True, cwd=ROOT)

    launcher = Launcher(lab, in_the_lab(yaml.safe_load(file.read_text()), lab), environment("LAUNCHER"))
    store = create_results(f"s3://{BUCKET}/results")
    launcher.up()
    assert list(cloud.running("head").values()) == [lab.address(0)]
    assert cloud.running("worker") == {}
    assert doors(cloud) == [("tcp", 22, [f"{lab.gateway}/32"]), ("-1", None, [])]

    with launcher.dashboard() as address:
        sweep = launcher.sweep(address, f"{SWEEP} --epochs {EPOCHS} --results s3://{BUCKET}/results")
        wait_until(lambda: len(cloud.running("worker")) == 2, PATIENCE, "two workers", sweep)
        wait_until(lambda: len(epochs_done(store)) == 2 and min(epochs_done(store)) >= 2, PATIENCE, "epochs", sweep)
        lost, lost_address = next(iter(cloud.running("worker").items()))
        cloud.ec2.terminate_instances(InstanceIds=[lost])
        lab.kill(lab.host_at(lost_address))
        log = sweep.wait(PATIENCE)
    assert "on up to 4 CPUs and 0 GPUs" in log
    assert log.count("started again") == 1, log
    assert_complete(store)
    assert {i["InstanceType"] for i in cloud.machines()} == {"t3.large", "c7i.4xlarge"}
    assert all(i.get("InstanceLifecycle") == "spot" for i in cloud.machines() if i["InstanceType"] == "c7i.4xlarge")

    wait_until(lambda: not cloud.running("worker"), PATIENCE, "idle workers to leave")
    assert len(cloud.running("head")) == 1
    launcher.down()
    assert {i["State"]["Name"] for i in cloud.machines()} == {"terminated"}
    subprocess.run([*aws, "leftovers"], check=True, cwd=ROOT)
    subprocess.run([*aws, "remove"], check=True, cwd=ROOT)
    assert asked_of(recording, "LAUNCHER") - granted("launcher") == set()
    assert asked_of(recording, "HEAD") - granted("head") == set()
    assert "RunInstances" in asked_of(recording, "LAUNCHER") & asked_of(recording, "HEAD")


def in_the_lab(config, lab):
    """The shipped file with what the lab cannot have as it is, and nothing else."""
    config["cluster_name"] = f"memlib-aws-{os.getpid()}"
    config["setup_commands"] = [SETUP]
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    config["provider"]["use_internal_ips"] = True
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["KeyName"] = "lab"
    config["available_node_types"]["cpu"]["resources"] = {"CPU": 2}  # what the hosts have
    config["max_workers"] = 2
    for node_type in config["available_node_types"].values():
        node_type["max_workers"] = min(2, node_type.get("max_workers", 0))
    config["idle_timeout_minutes"] = 0.5
    return config


def doors(cloud):
    """What the security group of the machines lets in: protocol, port, networks."""
    group = cloud.machines()[0]["SecurityGroups"][0]["GroupId"]
    rules = cloud.ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    return [(r["IpProtocol"], r.get("FromPort"), [n["CidrIp"] for n in r["IpRanges"]]) for r in rules]
