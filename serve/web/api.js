// Talks to the server of this page; every failure becomes an ApiError with a message for people.

export class ApiError extends Error {
  constructor(message, { status = 0, retrySeconds = null } = {}) {
    super(message);
    this.status = status;
    this.retrySeconds = retrySeconds;
  }
}

async function request(path, options) {
  let response, text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?", { retrySeconds: 3 });
  }
  if (response.ok) return text;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = JSON.parse(text).message ?? message;
  } catch { /* not JSON: the status line says it */ }
  const retry = response.headers.get("retry-after");
  throw new ApiError(message, { status: response.status, retrySeconds: retry === null ? null : Number(retry) });
}

export const getText = (path) => request(path);

export const getJson = async (path) => JSON.parse(await request(path));

export async function search(body, signal) {
  const begun = performance.now();
  const headers = { "content-type": "application/json" };
  const reply = JSON.parse(await request("/v1/search", { method: "POST", headers, body: JSON.stringify(body), signal }));
  return { ...reply, round_trip_ms: performance.now() - begun };
}
