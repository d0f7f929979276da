// A Restate service in another language, without an SDK: one handler that takes JSON and returns JSON.
// The service protocol: https://github.com/restatedev/service-protocol

import { createServer } from "node:http2";

const manifest = {
  protocolMode: "REQUEST_RESPONSE",
  minProtocolVersion: 5,
  maxProtocolVersion: 5,
  services: [
    {
      name: "Weather",
      ty: "SERVICE",
      handlers: [
        {
          name: "forecast",
          documentation: "Forecast the weather of a city.",
          input: {
            required: true,
            contentType: "application/json",
            jsonSchema: {
              type: "object",
              properties: { city: { type: "string", description: "Name of the city." }, days: { type: "integer" } },
              required: ["city"],
            },
          },
          output: { contentType: "application/json", setContentTypeIfEmpty: false },
        },
      ],
    },
  ],
};

const INPUT = 0x0400, OUTPUT = 0x0401, END = 0x0003;

function forecast({ city, days = 1 }) {
  if (city === "Atlantis") throw new Error("Atlantis has no weather.");
  return { city, forecast: Array(days).fill("sunny") };
}

// Protobuf: the fields of a message whose values have a length, by number.
function fields(buffer) {
  const found = {};
  let at = 0;
  const varint = () => {
    let value = 0, shift = 0, byte;
    do {
      byte = buffer[at++];
      value += (byte & 0x7f) * 2 ** shift;
      shift += 7;
    } while (byte & 0x80);
    return value;
  };
  while (at < buffer.length) {
    const tag = varint();
    const length = varint();
    if ((tag & 7) === 2) {
      found[tag >> 3] = buffer.subarray(at, at + length);
      at += length;
    }
  }
  return found;
}

function varint(value) {
  const bytes = [];
  for (; value > 0x7f; value >>>= 7) bytes.push((value & 0x7f) | 0x80);
  return Buffer.from([...bytes, value]);
}

const field = (number, content) =>
  Buffer.concat([varint((number << 3) | 2), varint(content.length), content]);

function frame(type, body = Buffer.alloc(0)) {
  const header = Buffer.alloc(8);
  header.writeUInt16BE(type, 0);
  header.writeUInt32BE(body.length, 4);
  return Buffer.concat([header, body]);
}

function answer(request) {
  for (let at = 0; at < request.length; ) {
    const type = request.readUInt16BE(at), length = request.readUInt32BE(at + 4);
    const body = request.subarray(at + 8, at + 8 + length);
    at += 8 + length;
    if (type !== INPUT) continue;
    const value = fields(fields(body)[14])[1];
    try {
      const result = Buffer.from(JSON.stringify(forecast(JSON.parse(value))));
      return Buffer.concat([frame(OUTPUT, field(14, field(1, result))), frame(END)]);
    } catch (error) {
      const failure = Buffer.concat([varint(8), varint(404), field(2, Buffer.from(error.message))]);
      return Buffer.concat([frame(OUTPUT, field(15, failure)), frame(END)]);
    }
  }
}

createServer((request, response) => {
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    if (request.url === "/discover") {
      response.setHeader("content-type", "application/vnd.restate.endpointmanifest.v3+json");
      response.end(JSON.stringify(manifest));
    } else {
      response.setHeader("content-type", "application/vnd.restate.invocation.v5");
      response.end(answer(Buffer.concat(chunks)));
    }
  });
}).listen(Number(process.argv[2]), "127.0.0.1");
