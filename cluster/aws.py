"""What a cluster on AWS needs beside `cluster.yaml`: made once, looked over for leftovers, removed again.

python cluster/aws.py prepare --bucket MY-BUCKET   # bucket, roles, security group; fills in cluster.yaml
python cluster/aws.py leftovers                    # what still runs or is stored, and costs; exit code 1 if anything
python cluster/aws.py remove                       # the roles and the security group; never the bucket
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import string
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3  # pyright: ignore[reportMissingImports]
import yaml
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingImports]

from memlib.errors import InputError

Client = Any  # boto3 makes the classes of its clients at run time

HERE = Path(__file__).parent
NAME = "memlib"  # of the security group and the tag `project`; the roles are memlib-head and memlib-worker
ROLES = ("head", "worker")
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
TAGGED = [{"Name": "tag:project", "Values": [NAME]}]
MAY_BE_ASSUMED = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 well, 1 leftovers found, 2 bad input or refused by AWS."""
    options = _parser().parse_args(arguments)
    try:
        region = yaml.safe_load(options.cluster.read_text())["provider"]["region"]
        return options.command(boto3.Session(region_name=region), options)
    except (BotoCoreError, ClientError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def prepare(session: boto3.Session, options: argparse.Namespace) -> int:
    """Make what is missing of bucket, roles and security group, and fill in the cluster file; safe to repeat."""
    source = caller_network(options.source)
    values = {"BUCKET": options.bucket, "ACCOUNT": session.client("sts").get_caller_identity()["Account"]}
    _make_bucket(session, options.bucket)
    for role in ROLES:
        _make_role(session.client("iam"), f"{NAME}-{role}", _policy(role, values))
    _make_spot_role(session.client("iam"))
    group = _make_group(session.client("ec2"), source, options.vpc)
    image = options.image or session.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"]
    fill_in(options.cluster, group, image)
    launcher = HERE / "iam-launcher.filled.json"
    launcher.write_text(_policy("launcher", values))
    print(f"{options.cluster} is filled in: image {image}, security group {group} (SSH from {source} alone).")
    print(f"Whoever runs ray up needs the rights in {launcher}. Results: --results s3://{options.bucket}/results")
    return 0


def leftovers(session: boto3.Session, options: argparse.Namespace) -> int:
    """Print the machines and disks with the project's tag and return 1 if there are any."""
    ec2 = session.client("ec2")
    pages = ec2.get_paginator("describe_instances").paginate(Filters=TAGGED)
    instances = [i for page in pages for reservation in page["Reservations"] for i in reservation["Instances"]]
    found = [
        f"{i['InstanceId']}  {i['InstanceType']}  {i['State']['Name']}"
        for i in instances
        if i["State"]["Name"] not in ("shutting-down", "terminated")
    ]
    volumes = [v for page in ec2.get_paginator("describe_volumes").paginate(Filters=TAGGED) for v in page["Volumes"]]
    found += [f"{v['VolumeId']}  {v['Size']} GB disk  {v['State']}" for v in volumes]
    print("\n".join(found) or f"nothing with the tag project={NAME} is left in {session.region_name}.")
    return 1 if found else 0


def remove(session: boto3.Session, options: argparse.Namespace) -> int:
    """Delete the roles and the security group; the bucket, with its results, stays."""
    if leftovers(session, options):
        raise InputError("machines or disks are left; end them first (ray down, then the EC2 console).")
    iam, ec2 = session.client("iam"), session.client("ec2")
    for role in (f"{NAME}-{role}" for role in ROLES):
        _unless_gone(iam.remove_role_from_instance_profile, InstanceProfileName=role, RoleName=role)
        _unless_gone(iam.delete_instance_profile, InstanceProfileName=role)
        _unless_gone(iam.delete_role_policy, RoleName=role, PolicyName=NAME)
        _unless_gone(iam.delete_role, RoleName=role)
    for group in _groups(ec2):
        ec2.delete_security_group(GroupId=group["GroupId"])
    print("removed: roles and security group. The bucket and the key pair ray-autoscaler_* stay.")
    return 0


def caller_network(source: str | None) -> str:
    """Return the network that SSH is opened to: the one given, else this machine's address as AWS sees it.

    Raises:
        InputError: it is no network, or wider than a company's.
    """
    if source is None:
        with urllib.request.urlopen("https://checkip.amazonaws.com", timeout=10) as answer:
            source = answer.read().decode().strip()
    try:
        network = ipaddress.IPv4Network(source)
    except ValueError as error:
        raise InputError(f"--from {source} is no IPv4 network ({error}); give e.g. 203.0.113.7/32.") from error
    if network.prefixlen < 16:
        raise InputError(f"--from {source} would open SSH to {network.num_addresses} addresses; give /16 or narrower.")
    return str(network)


def fill_in(cluster: Path, group: str, image: str) -> None:
    """Write the security group and the image into the cluster file, in place of what stands there."""
    text, n_groups = re.subn(r"(&closed \[)sg-[\w-]+", rf"\g<1>{group}", cluster.read_text())
    text, n_images = re.subn(r"(&image )ami-[\w-]+", rf"\g<1>{image}", text)
    if (n_groups, n_images) != (1, 1):
        raise InputError(f"{cluster} has no '&closed [sg-...]' or no '&image ami-...' to fill in; write them by hand.")
    cluster.write_text(text)


def _policy(role: str, values: dict[str, str]) -> str:
    return string.Template((HERE / f"iam-{role}.json").read_text()).substitute(values)


def _make_bucket(session: boto3.Session, bucket: str) -> None:
    s3, region = session.client("s3"), session.region_name
    if any(b["Name"] == bucket for b in s3.list_buckets()["Buckets"]):
        return
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    s3.create_bucket(Bucket=bucket, **place)
    blocked = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(blocked, True))


def _make_role(iam: Client, name: str, policy: str) -> None:
    """Make a role and its instance profile, and give it exactly this policy."""
    _unless_there(iam.create_role, RoleName=name, AssumeRolePolicyDocument=json.dumps(MAY_BE_ASSUMED))
    _unless_there(iam.create_instance_profile, InstanceProfileName=name)
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    iam.put_role_policy(RoleName=name, PolicyName=NAME, PolicyDocument=policy)


def _make_spot_role(iam: Client) -> None:
    """Make the account's own role for spot machines, which AWS makes by itself only in its console."""
    _unless_there(iam.create_service_linked_role, AWSServiceName="spot.amazonaws.com")


def _unless_there(create: Callable[..., object], **arguments: str) -> None:
    _unless(("EntityAlreadyExists", "InvalidInput"), create, arguments)  # InvalidInput: a service's own role is there


def _unless_gone(delete: Callable[..., object], **arguments: str) -> None:
    _unless(("NoSuchEntity",), delete, arguments)


def _unless(codes: tuple[str, ...], call: Callable[..., object], arguments: dict[str, str]) -> None:
    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] not in codes:
            raise


def _groups(ec2: Client, vpc: str | None = None) -> list[dict[str, Any]]:
    """Return the groups of our name: in that network, or in any."""
    filters = [{"Name": "group-name", "Values": [NAME]}, *([{"Name": "vpc-id", "Values": [vpc]}] if vpc else [])]
    return ec2.describe_security_groups(Filters=filters)["SecurityGroups"]


def _make_group(ec2: Client, source: str, vpc: str | None) -> str:
    """Return the group with exactly two rules: SSH from `source`, and everything among its own members."""
    vpc = vpc or _default_vpc(ec2)
    groups = _groups(ec2, vpc)
    if groups:
        group, rules = groups[0]["GroupId"], groups[0]["IpPermissions"]
    else:
        group = ec2.create_security_group(GroupName=NAME, Description="SSH from one place", VpcId=vpc)["GroupId"]
        rules = []
    if rules:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": source}]}
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, among])
    return group


def _default_vpc(ec2: Client) -> str:
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise InputError("this region has no default VPC; name one with --vpc.")
    return vpcs[0]["VpcId"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python cluster/aws.py", description=__doc__.split("\n\n")[0] if __doc__ else ""
    )
    parser.add_argument("--cluster", type=Path, default=HERE.parent / "cluster.yaml", help="default: cluster.yaml")
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("prepare", help="make bucket, roles and security group; fill in the cluster file")
    add.add_argument("--bucket", required=True, help="of the results; made if you have none of that name")
    add.add_argument("--from", dest="source", metavar="NETWORK", help="SSH from here; default: this machine's address")
    add.add_argument("--image", metavar="AMI", help="default: AWS's newest base image with NVIDIA's driver")
    add.add_argument("--vpc", metavar="ID", help="network of the machines; default: the region's default VPC")
    add.set_defaults(command=prepare)
    commands.add_parser("leftovers", help="what still costs").set_defaults(command=leftovers)
    commands.add_parser("remove", help="delete roles and security group").set_defaults(command=remove)
    return parser


if __name__ == "__main__":
    sys.exit(main())
