"""TLS in front of a server that has none, with certificates made on the spot."""

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates; its own is in ``path``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None), days=2)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, host: str, *, days: float = 2) -> tuple[str, str]:
        """Files of a certificate and its key; ``days`` below 0: it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        with contextlib.suppress(ValueError):
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        if not host[0].isdigit():
            alternative = x509.DNSName(host)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = self._sign(subject, key, x509.SubjectAlternativeName([alternative]), days=days)
        names = [self._folder / f"{host}{days}.{end}" for end in ("pem", "key")]
        names[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        names[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return str(names[0]), str(names[1])

    def _sign(self, subject, key, extension, *, days):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * _DAY)
            .not_valid_after(now + days * _DAY)
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if isinstance(extension, x509.BasicConstraints):
            usage = dict.fromkeys(
                (
                    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
                    *("key_agreement", "encipher_only", "decipher_only"),
                ),
                False,
            )
            builder = builder.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
        return builder.sign(self._key, hashes.SHA256())


class TlsProxy:
    """Decrypts what comes to ``port`` and passes it on to a port of 127.0.0.1."""

    def __init__(self, target_port: int, certificate: tuple[str, str], *, clients_of: Path | None = None) -> None:
        """``clients_of``: the authority that signs the certificates of clients; None: clients need none."""
        self._target_port = target_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*certificate)
        if clients_of is not None:
            self._context.load_verify_locations(clients_of)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context, ssl_handshake_timeout=3, limit=1 << 20)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            # Handshakes that clients broke off end by themselves; cancelled ones would leave their sockets open.
            if tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
                await asyncio.wait(tasks, timeout=5)
            await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        back, forth = await asyncio.open_connection("127.0.0.1", self._target_port, limit=1 << 20)
        try:
            await asyncio.gather(_copy(reader, forth), _copy(back, writer), return_exceptions=True)
        finally:
            self._open.discard(writer)
            for one in (writer, forth):
                one.transport.abort()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 18):
            sink.write(data)
            await sink.drain()
    sink.close()
