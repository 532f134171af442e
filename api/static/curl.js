// A request as a command for a shell. The key stands in it by the name of a variable only.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curlCommand(url, body, hasKey) {
  const words = [`curl -N ${quoted(url)}`, `-H 'Content-Type: application/json'`];
  if (hasKey) words.push(`-H "Authorization: Bearer $API_KEY"`);
  words.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return words.join(" \\\n  ");
}
