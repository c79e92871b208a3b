"""A small hub on the loopback address: the endpoints that an upload asks, over real HTTP."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAMES = ("create", "preupload", "batch", "store", "commit", "paths-info", "validate-yaml")


class Hub:
    """What it holds, and what it was asked.

    Attributes:
        fails: status to answer with instead, by what is asked.
    """

    def __init__(self):
        self.repos, self.large, self.files = {}, {}, {}
        self.asked, self.fails = [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                hub.answer(self)

            do_PUT = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, asking):
        body = asking.rfile.read(int(asking.headers.get("Content-Length") or 0))
        name = next(name for name in NAMES if f"/{name}" in asking.path)
        self.asked.append((name, asking.headers.get("Authorization")))
        status, said = 200, {}
        if name in self.fails:
            status, said = self.fails[name], {"error": "no"}
        elif name == "store":
            self.large[hashlib.sha256(body).hexdigest()] = body
        else:
            said = getattr(self, f"on_{name.replace('-', '_')}")(body)
        content = json.dumps(said).encode()
        asking.send_response(status)
        asking.send_header("Content-Type", "application/json")
        asking.send_header("Content-Length", str(len(content)))
        asking.end_headers()
        asking.wfile.write(content)

    def on_create(self, body):
        self.repos["me/mine"] = json.loads(body)
        return {"url": f"{self.url}/me/mine", "name": "me/mine", "id": "me/mine"}

    def on_validate_yaml(self, body):
        return {"errors": [], "warnings": []}

    def on_preupload(self, body):
        return {
            "files": [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                }
                for file in json.loads(body)["files"]
            ]
        }  # fmt: skip

    def on_batch(self, body):
        objects = []
        for file in json.loads(body)["objects"]:
            there = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.large:
                there["actions"] = {"upload": {"href": f"{self.url}/store/{file['oid']}"}}
            objects.append(there)
        return {"transfer": "basic", "objects": objects}

    def on_commit(self, body):
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
        oid = "a" * 40
        return {"commitOid": oid, "commitUrl": f"{self.url}/me/mine/commit/{oid}"}

    def on_paths_info(self, body):
        found = []
        for path, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if path.endswith("safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "oid": digest, "pointerSize": 134}
            found.append(entry)
        return found
