# Sourced by the start scripts. Neither server can end a kept connection by an answer: it cuts it, and a client that is
# just sending loses its request. So with DRAIN_S above 0 nginx stands in front: from the signal to stop on, it answers
# each request with "Connection: close", and ends with the last of them after DRAIN_S seconds; then the server ends.
# Behind a gateway that drains by itself, as on Kubernetes, DRAIN_S=0 saves the hop.

# front_start ADDRESS:PORT UPSTREAM_PORT
front_start() {
  front="$TMPDIR/redpp/front"
  rm -rf "$front"
  mkdir -p "$front"
  account=
  if [ "$(id -u)" = 0 ]; then account="user root;"; fi  # or its worker might not see the folder
  cat > "$front/nginx.conf" <<CONF
$account
daemon off;
worker_processes 1;
pid $front/pid;
error_log stderr warn;
events { worker_connections 2048; }
http {
    access_log off;
    server_tokens off;
    client_body_temp_path $front/body;
    proxy_temp_path $front/proxy;
    fastcgi_temp_path $front/fastcgi;
    uwsgi_temp_path $front/uwsgi;
    scgi_temp_path $front/scgi;
    client_max_body_size 0;  # the server has its own limit
    client_body_buffer_size 256k;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host \$http_host;
    proxy_request_buffering off;
    proxy_max_temp_file_size 0;
    proxy_read_timeout 300s;
    keepalive_requests 1000000;
    upstream server {
        server 127.0.0.1:$2;
        keepalive 64;
    }
    server {
        listen $1;
        error_page 418 = @last;  # a named location keeps method, path and body
        location / {
            if (-f $front/draining) { return 418; }
            proxy_pass http://server;
        }
        location @last {
            keepalive_timeout 0;
            proxy_pass http://server;
        }
    }
}
CONF
  PATH="$PATH:/usr/sbin" nginx -e stderr -c "$front/nginx.conf" &
  front_pid=$!
}

# front_drain: return when the last request is answered.
front_drain() {
  touch "$front/draining"
  sleep "$DRAIN_S"
  kill -QUIT "$front_pid" 2>/dev/null || return 0
  while kill -0 "$front_pid" 2>/dev/null; do sleep 0.1; done
}
