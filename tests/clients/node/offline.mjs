/** Loaded before every program in Node: a test may not reach the network. */

import net from "node:net";

net.Socket.prototype.connect = function connect(...target) {
  throw new Error(`a connection was tried: ${JSON.stringify(target[0])}`);
};
