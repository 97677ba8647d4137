"""A token service in a pod: AssumeRoleWithWebIdentity for one service account. The API server says whose a token is."""

import json
import ssl
import urllib.request
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

AUDIENCE, TRUSTED = "sts.example.com", "system:serviceaccount:roles:tuner"
OWN = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><AssumedRoleUser><Arn>{role}/x</Arn><AssumedRoleId>A:x</AssumedRoleId></AssumedRoleUser>
<Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken></SessionToken>
<Expiration>{until}</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""
REFUSED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>InvalidIdentityToken</Code><Message>{user} may not assume the role</Message></Error></ErrorResponse>"""


def user_of(token: str) -> str:
    """Ask the API server whose token this is."""
    spec = {"token": token, "audiences": [AUDIENCE]}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    request = urllib.request.Request(
        "https://kubernetes.default.svc/apis/authentication.k8s.io/v1/tokenreviews",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {(OWN / 'token').read_text()}"},
    )
    trust = ssl.create_default_context(cafile=str(OWN / "ca.crt"))
    with urllib.request.urlopen(request, context=trust, timeout=10) as answer:
        status = json.load(answer)["status"]
    return str(status["user"]["username"]) if status.get("authenticated") else "nobody"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        role, user = form["RoleArn"][0], user_of(form["WebIdentityToken"][0])
        print(role, "for", user, flush=True)
        key, secret = (Path("/key", name).read_text() for name in ("access-key-id", "secret-access-key"))
        until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        known = ANSWER.format(role=role, key=key, secret=secret, until=until)
        text = (known if user == TRUSTED else REFUSED.format(user=user)).encode()
        self.send_response(200 if user == TRUSTED else 400)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("", 8000), Handler)
    print("the token service listens", flush=True)
    server.serve_forever()
