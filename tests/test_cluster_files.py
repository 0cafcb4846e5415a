"""Every cluster file that is shipped: what Ray and EC2 accept, closed doors, one version of everything."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

from memlib.errors import InputError

ROOT = Path(__file__).parent.parent
FILES = sorted(p for place in ("*", "[a-z]*/**/*") for p in ROOT.glob(f"{place}.y*ml"))
AWS = [p for p in FILES if "type: aws" in p.read_text()]
POLICIES = sorted(ROOT.glob("cluster/iam-*[a-z].json"))


def load(file):
    return yaml.safe_load(file.read_text())


def check(config):
    """Raise for what Ray would refuse; offline, as `ray up` does it before anything is started."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return config


def broken_rules(config):
    """The security and budget rules that a cluster file breaks."""
    start = {k: " ".join(config[k]) for k in ("head_start_ray_commands", "worker_start_ray_commands")}
    rules = {
        "dashboard on loopback": "--dashboard-host=127.0.0.1" in start["head_start_ray_commands"],
        "token mode on head and workers": all(
            re.search(r"export [^;&]*\bRAY_AUTH_MODE=token\b[^;]*ray start", text) for text in start.values()
        ),
        "token brought along": "~/.ray/auth_token" in config["file_mounts"],
        "token readable by its owner alone": all("chmod 600 ~/.ray/auth_token" in text for text in start.values()),
        "no door open to the world": not re.search(r"0\.0\.0\.0|::/0", json.dumps(config)),
    }
    if config["provider"]["type"] == "aws":
        rules |= _aws_rules(config)
    return [rule for rule, kept in rules.items() if not kept]


def _aws_rules(config):
    types = config["available_node_types"]
    workers = [t for name, t in types.items() if name != config["head_node_type"]]
    nodes = [t["node_config"] for t in types.values()]
    gpu = [t for t in workers if t["resources"].get("GPU")]
    tags = [{"Key": "project", "Value": "memlib"}]
    return {
        "a security group of its own, not Ray's open one": all(n.get("SecurityGroupIds") for n in nodes)
        and "security_group" not in config["provider"],
        "roles of its own, not Ray's wide one": all("IamInstanceProfile" in n for n in nodes),
        "session tokens for the metadata service": all(n["MetadataOptions"]["HttpTokens"] == "required" for n in nodes),
        "a finite number of workers": 0 < config["max_workers"] <= 100
        and all(0 < t["max_workers"] <= config["max_workers"] for t in workers),
        "no worker that is always on": all(t.get("min_workers", 0) == 0 for t in workers),
        "idle time-out that does not flap": 10 <= config["idle_timeout_minutes"] <= 60,
        "workers on spot, the head not": "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
        and all(t["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for t in workers),
        "no work on the head": types[config["head_node_type"]]["resources"] == {"CPU": 0},
        "several GPU types": len({t["node_config"]["InstanceType"] for t in gpu}) >= 2,
        "CPU workers too": any("GPU" not in t["resources"] for t in workers),
        "several zones": len(config["provider"]["availability_zone"].split(",")) >= 2,
        "terminated, not stopped": config["provider"]["cache_stopped_nodes"] is False,
        "tagged machines and disks": all(
            {s["ResourceType"]: s["Tags"] for s in n["TagSpecifications"]} == {"instance": tags, "volume": tags}
            for n in nodes
        ),
        "encrypted disks that go with their machine": all(
            d["Ebs"]["Encrypted"] and d["Ebs"]["DeleteOnTermination"] for n in nodes for d in n["BlockDeviceMappings"]
        ),
        "one image everywhere": len({n["ImageId"] for n in nodes}) == 1,
    }


def test_the_shipped_files_are_these():
    assert [p.name for p in FILES] == ["cluster-local.yaml", "cluster.yaml"]
    assert [p.name for p in AWS] == ["cluster.yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_ray_accepts_the_file(file):
    check(load(file))


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_no_security_or_budget_rule_is_broken(file):
    assert broken_rules(load(file)) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard on loopback"),
        ("export RAY_AUTH_MODE=token", "export", "token mode on head and workers"),
        ("chmod 600 ~/.ray/auth_token", "true", "token readable by its owner alone"),
        ("[sg-FILL-IN]", "[]", "a security group of its own, not Ray's open one"),
        ("idle_timeout_minutes: 15", "idle_timeout_minutes: 1", "idle time-out that does not flap"),
        ("max_workers: 8   ", "max_workers: 1000", "a finite number of workers"),
        ("{MarketType: spot}", "{MarketType: capacity-block}", "workers on spot, the head not"),
        (",us-east-1b,us-east-1c", "", "several zones"),
        ("resources: {CPU: 0}", "resources: {CPU: 2}", "no work on the head"),
    ],
)
def test_a_file_that_breaks_a_rule_is_named(old, new, rule):
    text = (ROOT / "cluster.yaml").read_text()
    assert old in text
    assert rule in broken_rules(yaml.safe_load(text.replace(old, new)))


@pytest.mark.parametrize(
    ("where", "value"),
    [(("max_worker",), 3), (("head_node_type",), "haed"), (("available_node_types", "cpu", "min_worker"), 1)],
)
def test_a_misspelt_key_is_refused(where, value):
    config = load(ROOT / "cluster.yaml")
    inner = config
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(Exception, match=r"head_node_type|max_worker|min_worker"):
        check(config)


@pytest.mark.parametrize("file", AWS, ids=lambda p: p.name)
def test_ec2_accepts_every_machine_and_no_misspelt_one(file):
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in check(load(file))["available_node_types"].values():
        asked = {"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}
        assert not ParamValidator().validate(asked, model).generate_report()
        wrong = {**asked, "InstanceTyp": asked["InstanceType"]}
        assert "InstanceTyp" in ParamValidator().validate(wrong, model).generate_report()


def test_head_and_workers_install_by_the_same_script_and_it_alone_knows_the_versions():
    for file in FILES:
        config = load(file)
        assert config["setup_commands"] == ["~/memlib/cluster/setup_node.sh"]
        assert not {"head_setup_commands", "worker_setup_commands", "initialization_commands"} & set(config)
        assert not re.search(r"pip install|ray==|python3\.\d", json.dumps(config))
    script = (ROOT / "cluster" / "setup_node.sh").read_text()
    assert "cluster/python-version" in script
    assert "--constraint constraints.txt" in script


def test_a_node_gets_the_versions_that_are_tested():
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert tested["ray"] == version("ray")
    minor = ".".join((ROOT / "cluster" / "python-version").read_text().split(".")[:2])
    assert minor == f"{sys.version_info.major}.{sys.version_info.minor}"


def actions(policy):
    return [a for s in policy["Statement"] for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])]


@pytest.mark.parametrize("file", POLICIES, ids=lambda p: p.name)
def test_a_policy_grants_no_action_wholesale_and_changes_only_what_is_ours(file):
    policy = json.loads(file.read_text())
    assert all(re.fullmatch(r"(ec2|iam|s3):[A-Za-z]+", action) for action in actions(policy))
    for statement in policy["Statement"]:
        looks = all(a.startswith("ec2:Describe") for a in actions({"Statement": [statement]}))
        assert statement["Effect"] == "Allow"
        assert looks or statement["Resource"] != "*", statement["Sid"]


def test_only_tagged_machines_are_started_or_ended_and_only_one_role_is_handed_over():
    for name, role in (("head", "memlib-worker"), ("launcher", "memlib-head")):
        policy = json.loads((ROOT / "cluster" / f"iam-{name}.json").read_text())
        by_action = {s["Sid"]: s for s in policy["Statement"]}
        assert by_action["StartMachinesWithTheTag"]["Condition"] == {
            "StringEquals": {"aws:RequestTag/project": "memlib"}
        }
        assert by_action["EndAndRelabelOnlyThose"]["Condition"] == {
            "StringEquals": {"aws:ResourceTag/project": "memlib"}
        }
        assert by_action["HandOverARole"]["Resource"].endswith(f"role/{role}")


def test_a_worker_may_use_the_bucket_and_nothing_else():
    policy = json.loads((ROOT / "cluster" / "iam-worker.json").read_text())
    assert all(action.startswith("s3:") for action in actions(policy))
    assert {s["Resource"] for s in policy["Statement"]} == {"arn:aws:s3:::${BUCKET}", "arn:aws:s3:::${BUCKET}/*"}


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "ray://head:10001"])
def test_an_address_of_ray_client_is_refused_with_the_way_instead(address):
    from sweeps.cluster import check_address

    with pytest.raises(InputError, match="submit it as a job"):
        check_address(address)
