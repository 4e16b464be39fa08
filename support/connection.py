"""Where requests go and with which keys: addresses, certificates, proxies, the HTTP library."""

import contextlib
import os
import re
import ssl
from urllib.parse import urlsplit

from evaluate import UserError, non_negative_int
from support.console import first_line, positive_int

try:
    import httpx2 as httpx  # the name under which huggingface_hub 2 brings it
except ImportError:
    import httpx

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
LOCAL = ("localhost", "127.0.0.1", "0.0.0.0", "::1")
KEY_HEADERS = {"authorization", "api-key", "x-api-key", "x-goog-api-key"}  # instead of a bearer
CONNECT_TIMEOUT = 20  # seconds


def add_server_options(parser):
    """Add the options of a `support.client.Client`."""
    add = parser.add_argument
    add(
        "--api-key-env",
        metavar="NAME",
        default=KEY,
        help="environment variable with the server's key; where it is not set, `none` is sent",
    )
    add(
        "--header",
        metavar="NAME=VARIABLE",
        action="append",
        help="send another header, with the value of an environment variable; for instance "
        "api-key=AZURE_KEY, which then takes the place of --api-key-env",
    )
    add("--timeout", type=positive_int, default=180, help="seconds to wait for a whole reply")
    add(
        "--max-retries",
        type=non_negative_int,
        default=5,
        help="how often a request is tried again that met a fault, and one whose reply was not "
        "accepted; a rate limit does not count",
    )


def endpoint(base_url):
    """The address that requests go to, by the rule of OpenAI's own client. Raises UserError."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and base_url.isprintable() and " " not in base_url and httpx.URL(base_url)
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        raise UserError(
            f"--base-url: {without_query(base_url)!r} is no address; one is like "
            "http://localhost:8000/v1"
        )
    if "@" in parts.netloc:
        raise UserError("--base-url: leave out name and password; keys come from the environment")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def without_query(url):
    """An address as messages show it: what follows `?` may be a key."""
    return url.partition("?")[0]


def credentials(options, url):
    """(headers with the keys, the variable that holds the key or None). Raises UserError."""
    headers, source = {}, None
    for pair in options.header or ():
        name, _, variable = pair.partition("=")
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
            raise UserError("--header: takes NAME=VARIABLE, a header and an environment variable")
        headers[name.lower()] = secret(variable, "--header", "[ -~]*")
        source = variable if name.lower() in KEY_HEADERS else source
    if source is None:
        optional = (
            options.api_key_env == KEY and urlsplit(url).hostname != urlsplit(OPENAI).hostname
        )
        key = secret(options.api_key_env, "--api-key-env", "[!-~]*", optional)
        headers["authorization"] = f"Bearer {key or 'none'}"
        source = options.api_key_env if key else None
    return headers, source


def secret(variable, option, allowed, optional=False):
    """The value of an environment variable. Raises UserError.

    No message shows the value, nor what might be a key itself, given in place of a variable.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise UserError(f"{option}: takes the name of an environment variable that holds the key")
    name = variable if variable.isupper() else f"that {option} names"
    value = os.environ.get(variable, "").strip()
    if not value and not optional:
        raise UserError(f"no key: the environment variable {name} is not set")
    if not re.fullmatch(allowed, value):  # the HTTP library's complaint would show it
        raise UserError(
            f"the environment variable {name} holds a space, line break or letter that no key has"
        )
    return value


def open_http(url, headers, timeout, connections):
    """The HTTP client. Raises UserError where a setting in the environment can't be used."""
    parts = urlsplit(url)
    context = tls_context() if parts.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx.AsyncClient(
            headers={"user-agent": "dynamic-cot"} | headers,
            verify=context,
            trust_env=parts.hostname not in LOCAL,  # proxies; TLS has its own context
            timeout=httpx.Timeout(None, connect=min(CONNECT_TIMEOUT, 0.9 * timeout)),
            limits=httpx.Limits(max_keepalive_connections=connections, keepalive_expiry=4),
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise UserError(
            f"the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY can't be used: {first_line(error)}"
        ) from None


def tls_context():
    """What verifies certificates, by SSL_CERT_FILE or SSL_CERT_DIR where set. Raises UserError."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise UserError(
            f"{os.environ.get(name)}: can't be read as certificates ({first_line(error)}); "
            f"correct the environment variable {name}"
        ) from None


def speaks_https(url):
    """Whether the server of an http:// address answers a TLS handshake."""
    parts = urlsplit(url)
    with contextlib.suppress(OSError):
        address = (parts.hostname, parts.port or 80)
        return parts.scheme == "http" and bool(ssl.get_server_certificate(address, timeout=3))
    return False
