"""What `cluster/aws.py` makes, against a mock of AWS in this process."""

import importlib.util
import json
from pathlib import Path

import boto3
import moto
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of boto3's and moto's own making
CLUSTER = Path(__file__).parent.parent / "cluster"
IMAGE = "ami-03cf127a"


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """The command on a copy of the cluster file and the policies, and a client of the mock."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mock")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    spec = importlib.util.spec_from_file_location("cluster_aws", CLUSTER / "aws.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for policy in CLUSTER.glob("iam-*[a-z].json"):
        (tmp_path / policy.name).write_text(policy.read_text())
    monkeypatch.setattr(module, "HERE", tmp_path)
    file = tmp_path / "cluster.yaml"
    file.write_text((CLUSTER.parent / "cluster.yaml").read_text())
    with moto.mock_aws():
        yield lambda *arguments: module.main(["--cluster", str(file), *arguments])


def prepare(aws, source="203.0.113.7"):
    return aws("prepare", "--bucket", "memlib-test", "--from", source, "--image", IMAGE)


def group():
    ec2 = boto3.client("ec2", "us-east-1")
    return ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["memlib"]}])["SecurityGroups"]


def doors():
    return [(r["IpProtocol"], [n["CidrIp"] for n in r["IpRanges"]]) for r in group()[0]["IpPermissions"]]


def test_ssh_is_open_to_the_caller_alone_also_after_the_address_has_changed(aws):
    assert prepare(aws) == 0
    assert doors() == [("tcp", ["203.0.113.7/32"]), ("-1", [])]
    assert prepare(aws, "203.0.113.8") == 0
    assert doors() == [("tcp", ["203.0.113.8/32"]), ("-1", [])]


def test_a_group_that_somebody_opened_is_closed_again(aws):
    prepare(aws)
    world = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    boto3.client("ec2", "us-east-1").authorize_security_group_ingress(
        GroupId=group()[0]["GroupId"], IpPermissions=[world]
    )
    prepare(aws)
    assert doors() == [("tcp", ["203.0.113.7/32"]), ("-1", [])]


def test_the_cluster_file_is_filled_in_and_nothing_else_in_it_changes(aws, tmp_path):
    prepare(aws)
    filled, shipped = (tmp_path / "cluster.yaml").read_text(), (CLUSTER.parent / "cluster.yaml").read_text()
    identifier = group()[0]["GroupId"]
    assert filled == shipped.replace("sg-FILL-IN", identifier).replace("ami-FILL-IN", IMAGE)


def test_the_roles_have_the_shipped_rights_for_this_bucket_and_account(aws):
    prepare(aws)
    iam = boto3.client("iam")
    for role in ("head", "worker"):
        rights = iam.get_role_policy(RoleName=f"memlib-{role}", PolicyName="memlib")["PolicyDocument"]
        text = (CLUSTER / f"iam-{role}.json").read_text()
        assert rights == json.loads(text.replace("${BUCKET}", "memlib-test").replace("${ACCOUNT}", "123456789012"))
        profile = iam.get_instance_profile(InstanceProfileName=f"memlib-{role}")["InstanceProfile"]
        assert [r["RoleName"] for r in profile["Roles"]] == [f"memlib-{role}"]


def test_the_bucket_is_closed_to_the_public(aws):
    prepare(aws)
    blocked = boto3.client("s3").get_public_access_block(Bucket="memlib-test")["PublicAccessBlockConfiguration"]
    assert all(blocked.values())


def test_a_machine_that_is_left_is_named_and_keeps_everything_in_place(aws, capsys):
    prepare(aws)
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "project", "Value": "memlib"}]}]
    ec2 = boto3.client("ec2", "us-east-1")
    made = ec2.run_instances(ImageId=IMAGE, MinCount=1, MaxCount=1, TagSpecifications=tags)["Instances"][0]
    assert aws("leftovers") == 1
    assert made["InstanceId"] in capsys.readouterr().out
    assert aws("remove") == 2
    assert group()
    ec2.terminate_instances(InstanceIds=[made["InstanceId"]])
    assert aws("leftovers") == 0
    assert aws("remove") == 0
    assert aws("remove") == 0, "removing twice is fine"
    assert group() == []
    assert [b["Name"] for b in boto3.client("s3").list_buckets()["Buckets"]] == ["memlib-test"]


@pytest.mark.parametrize(
    ("source", "said"), [("0.0.0.0/0", "would open SSH to 4294967296"), ("here", "is no IPv4 network")]
)
def test_a_door_open_to_many_is_refused_before_anything_is_made(aws, capsys, source, said):
    assert prepare(aws, source) == 2
    assert said in capsys.readouterr().err
    assert group() == []


def test_a_network_that_is_named_gets_a_group_of_its_own(aws):
    prepare(aws)
    (default,) = group()
    vpc = boto3.client("ec2", "us-east-1").create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
    for _ in range(2):
        options = ["prepare", "--bucket", "memlib-test", "--from", "203.0.113.7", "--image", IMAGE, "--vpc", vpc]
        assert aws(*options) == 0
        assert sorted(found["VpcId"] for found in group()) == sorted([default["VpcId"], vpc])
