// SPDX-License-Identifier: Apache-2.0
// Calls methods of matrix-js-sdk's client, and prints its requests and the results.
// node call.mjs <the SDK's index.js>, with {"client": {…}, "calls": [["method", argument, …], …]}
// on its standard input. The answer is the last line of its output.
import { readFileSync } from "node:fs";

const { createClient } = await import(process.argv[2]);
const { client: options, calls } = JSON.parse(readFileSync(0, "utf8"));

const requests = [];
const client = createClient({
    ...options,
    fetchFn: (url, request) => {
        requests.push({
            method: request.method,
            path: new URL(url).pathname,
            authorization: request.headers.Authorization,
            body: request.body && JSON.parse(request.body),
        });
        return fetch(url, request);
    },
});

const results = [];
for (const [method, ...args] of calls) {
    try {
        results.push(await client[method](...args));
    } catch (e) {
        if (e.httpStatus === undefined) throw e;
        results.push({ status: e.httpStatus, errcode: e.errcode });
    }
}
console.log("\n" + JSON.stringify({ requests, results }));
