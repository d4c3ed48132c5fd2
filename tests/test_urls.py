"""What is shown of an address holds none of its secrets, and all of the rest."""

import pytest

from mae_dist.urls import has_secret, masked

SECRET = "pl4nted+S3cret=="
WITH = (
    "https://user:{}@host:8000/a/b.tar",
    "https://user:{}/x@host/b.tar",
    "https://{}@host/b.tar",
    "postgresql://me:{}@db/mlflow",
    "https://host/a.tar?X-Amz-Signature={}&X-Amz-Expires=3600",
    "https://host/a.tar?sv=1&sig={}",
    "pipe:curl -s -H 'Authorization: Bearer {}' https://host/a.tar",
    "pipe:curl -H 'X-Api-Key: {}' https://host/a.tar",
    "pipe:curl -u me:{} https://host/a.tar",
    "pipe:aws --token {} s3 cp s3://bucket/a.tar -",
    "pipe:AWS_SECRET_ACCESS_KEY={} aws s3 cp s3://bucket/a.tar -",
    "pipe:SECRET='{} and more' fetch a.tar",
    "HTTPConnectionPool(host='h', port=80): Max retries exceeded with url: /a.tar?sig={} (Caused by x)",
    "pipe:curl -u 'me:{}' https://host/a.tar",
    "pipe:curl -ume:{} https://host/a.tar",
    "pipe:curl --proxy-user me:{} https://host/a.tar",
    "pipe:curl -b 'session={}' https://host/a.tar",
    "pipe:curl -H Authorization:\\ Bearer\\ {} https://host/a.tar",
    "pipe:sshpass -p {} ssh host cat a.tar",
    "pipe:openssl enc -d -pass pass:{} -in a.tar",
    "pipe:gpg --passphrase {} -d a.tar",
    "pipe:curl -H 'Authorization: ApiKey {}' https://host/a.tar",
    'pipe:curl -H \'Authorization: Digest username="me", response="{}"\' https://host/a.tar',
    "Authorization: Digest {}",
    "pipe:curl -H 'Cookie: a=b; session={}' https://host/a.tar",
    "Cookie: a=b; session={}",
    "pipe:rclone cat --sftp-pass={} r:a.tar",
    "pipe:curl --key k.pem --pass {} https://host/a.tar",
    "pipe:PASS={} fetch a.tar",
    "pipe:AZURE_STORAGE_KEY={} az storage blob download",
    "pipe:lftp -u me,{} host",
    "pipe:smbclient -U me%{} //host/a",
    "sas={}",
    "AccountName=a;AccountKey={};EndpointSuffix=core.windows.net",
    "{'aws_secret_access_key': '{}'}",
    'pipe:curl -d \'{"token": "{}"}\' https://host',
    "https://host/a.tar?AKeyOfSixteenLetters{}",
    "https://user:{}?x@host/a.tar",
    "https://user:a#{}@host/a.tar",
    "error: https://user:{}@host/a.tar: 403, message='Forbidden', url='https://host/a.tar?token={}'",
)
WITHOUT = (
    "s3://bucket/train-{0000..1023}.tar", "/data/a b/c@d.tar", "pipe:cat /data/a.tar", "https://host:80/a@b.tar", "https://h/a@b",
    "optim.lr: 3e-4", "mask_token: missing", "spike_sigma=6", "sqlite:////runs/a/mlflow.db", "/data/x?/*.tar",
    "https://h/a.tar?download", "pipe:tar -b 20 -xO a.tar", "pipe:curl -url=https://h/a.tar", "cls_token: 768 numbers",
    "bypass=1", "author=me", "pipe:sort -u /data/a.txt", "pipe:rsync -a host:/a.tar -",
)  # fmt: skip


@pytest.mark.parametrize("text", WITH)
def test_no_secret_is_shown(text: str):
    shown = masked(text.replace("{}", SECRET))
    assert "pl4nted" not in shown and "S3cret" not in shown and "more'" not in shown
    assert masked(shown) == shown and has_secret(text.replace("{}", SECRET)) and not has_secret(shown)


@pytest.mark.parametrize("text", WITHOUT)
def test_what_is_no_secret_stays(text: str):
    assert masked(text) == text
