"""What tests run on hosts to ask the database and the object storage; `V` holds the values."""

# Prints the user that the database takes the client for, or why it takes it for none.
CONNECT = """
import asyncio, asyncpg, ssl
authority = V.pop("authority", "/etc/prefect/ca.pem")
V["ssl"] = ssl.create_default_context(cafile=authority) if authority else False
async def main():
    try:
        connection = await asyncpg.connect(timeout=10, **V, port=5432, database="prefect")
        print(await connection.fetchval("select current_user"))
    except Exception as error:
        print(type(error).__name__, error)
asyncio.run(main())
"""

# `attempt(client.list_objects_v2, Bucket=…)` says that the call was done, or the error's code.
S3 = """
import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
client = boto3.client("s3", endpoint_url=V["url"], region_name="us-east-1",
    aws_access_key_id=V["access"], aws_secret_access_key=V["secret"], verify="/etc/prefect/ca.pem",
    config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}))
def attempt(call, **arguments):
    try:
        call(**arguments)
        return "done"
    except ClientError as error:
        return error.response["Error"]["Code"]
"""
