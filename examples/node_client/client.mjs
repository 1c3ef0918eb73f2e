// Drives an episode of a policy in another language than the server's, from the .proto files alone.
//
//   cd examples/node_client && npm install
//   vla-dist serve runs/<id> --single            (in another terminal)
//   node client.mjs 127.0.0.1:9000 demo@stable 10 [token]
//
// Prints one line of JSON for each answer: the version that acted, and the first action of the chunk.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address = "127.0.0.1:9000", policy = "demo@stable", steps = "10", token = ""] = process.argv.slice(2);
const root = fileURLToPath(new URL("../..", import.meta.url));
const options = { includeDirs: [root], keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
const v1 = grpc.loadPackageDefinition(loader.loadSync("vla_dist/protocol/v1/policy.proto", options)).vla_dist.v1;
const client = new v1.PolicyService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (token) metadata.set("authorization", `Bearer ${token}`);

const float32 = (values) => ({
  data_type: "DATA_TYPE_FLOAT32",
  shape: [values.length],
  data: Buffer.from(Float32Array.from(values).buffer), // C order, little endian
});
const chunkOf = ({ shape, data }) => {
  const numbers = new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.length));
  return Array.from({ length: shape[0] }, (_, row) => [...numbers.slice(row * shape[1], (row + 1) * shape[1])]);
};
const observe = (spec, step) => ({
  proprio: float32(spec.proprio.map((_, index) => Math.sin(step + index))),
  instruction: "go",
  images: Object.fromEntries(
    spec.cameras.map(({ name, height, width }) => [
      name,
      { data_type: "DATA_TYPE_UINT8", shape: [height, width, 3], data: Buffer.alloc(height * width * 3, step) },
    ]),
  ),
});

// A real robot brings its own contract; here it is the policy's.
client.ListPolicies({}, metadata, (error, served) => {
  if (error) return fail(error);
  const found = served.policies.find((one) => one.policy === policy);
  if (!found) return fail(new Error(`${policy} is not served at ${address}`));
  const { spec } = found.versions.find(({ version }) => version === found.current_version);
  drive(spec);
});

function drive(spec) {
  const stream = client.Control(metadata);
  let step = 0;
  const ask = () =>
    stream.write({ observation: { observation: observe(spec, step), observation_id: step, deadline_ms: 2000 } });
  stream.on("error", fail);
  stream.on("end", () => client.close());
  stream.on("data", ({ opened, chunk, refusal }) => {
    if (opened) return ask();
    if (refusal) return fail(new Error(`${refusal.reason}: ${refusal.detail}`));
    const actions = chunkOf(chunk.actions);
    console.log(JSON.stringify({ step, version: chunk.policy_version, rows: actions.length, action: actions[0] }));
    step += 1;
    if (step < Number(steps)) return ask();
    stream.write({ goodbye: { outcome: "EPISODE_OUTCOME_SUCCESS", episode_id: `node-${Date.now()}` } });
    stream.end();
  });
  stream.write({ open: { session: { spec, policy, robot_id: "node" } } });
}

function fail(error) {
  console.error(`${error.code ?? ""} ${error.details ?? error.message}`.trim());
  process.exit(1);
}
