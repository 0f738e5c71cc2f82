-- Sends the requests of a file, each once, in order: wrk does no work for a request but read its bytes.
--
--   wrk … -s wrk.lua URL -- REQUESTS [loop] [note ACKNOWLEDGED]
--
-- `loop`: begin again at the file's end (for servers that keep nothing). `note`: write the event id in each 2xx answer
-- into a file; that costs time, so it is for checking and not for measuring.
-- The last line on standard output is one JSON object: see load.py.

local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init(args)
   dry = false
   source = assert(io.open(args[1], "rb"))
   source:setvbuf("full", 1048576)
   for at = 2, #args do
      if args[at] == "loop" then
         looping = true
      elseif args[at] == "note" then
         local noted = assert(io.open(args[at + 1], "wb"))
         response = function(status, headers, body)
            if status < 300 then
               noted:write(string.match(body, '"event_id": ?"([^"]+)"') or "?", "\n")
               noted:flush()
            end
         end
      end
   end
end

function request()
   local length = source:read(8)
   if not length then
      if not looping then
         -- Nothing is left. What is sent from here on is a duplicate, and the caller throws the run away.
         dry = true
         wrk.thread:stop()
      end
      source:seek("set", 0)
      length = source:read(8)
   end
   return source:read(tonumber(length))
end

function done(summary, latency, requests)
   local ran_dry = false
   for _, thread in ipairs(threads) do
      ran_dry = ran_dry or thread:get("dry")
   end
   io.write(string.format(
      '{"requests": %d, "microseconds": %d, "connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d, ' ..
      '"dry": %s, "p50": %d, "p90": %d, "p99": %d, "max": %d, "mean": %.1f}\n',
      summary.requests, summary.duration, summary.errors.connect, summary.errors.read, summary.errors.write,
      summary.errors.status, summary.errors.timeout, tostring(ran_dry),
      latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max, latency.mean))
end
