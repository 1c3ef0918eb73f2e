"""Says whenever the fake cloud's instances change, as lines of JSON: {"running": {private address: type}}.

python ec2_watch.py ENDPOINT REGION
"""

import json
import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def main(endpoint: str, region: str) -> None:
    client = boto3.client("ec2", endpoint_url=endpoint, region_name=region)
    known = None
    while True:
        try:
            pages = client.get_paginator("describe_instances").paginate()
            found = [one for page in pages for group in page["Reservations"] for one in group["Instances"]]
        except (BotoCoreError, ClientError):
            time.sleep(0.5)
            continue
        alive = [one for one in found if one["State"]["Name"] in ("pending", "running")]
        running = {one["PrivateIpAddress"]: [one["InstanceId"], one["InstanceType"]] for one in alive}
        if running != known:
            known = running
            print(json.dumps({"running": running}), flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
